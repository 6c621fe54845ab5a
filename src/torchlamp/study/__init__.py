"""Studies on real models and text: loading, metrics, evaluation, results."""

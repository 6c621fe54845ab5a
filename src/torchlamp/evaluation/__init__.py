"""Measuring a policy: KL, flips, perplexity, rates, costs, calibrations and tasks."""

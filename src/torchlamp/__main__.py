"""``python -m torchlamp`` is the command ``torchlamp``."""

from torchlamp.cli import main

if __name__ == "__main__":
    main()

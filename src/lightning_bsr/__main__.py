"""``python -m lightning_bsr`` is ``lightning-bsr``."""

from lightning_bsr.cli import main

if __name__ == "__main__":
    main()

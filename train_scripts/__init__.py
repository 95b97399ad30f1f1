"""Training scripts: `accelerate launch train_scripts/NAME.py`, or `-m hwdiffusion.train_scripts.NAME`."""

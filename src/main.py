"""`python src/main.py --config my_config.yaml`: train; other commands as in `sdxl-training --help`."""

from sdxl_training.cli import main

if __name__ == "__main__":
    main()

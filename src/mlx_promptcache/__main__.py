"""`python -m mlx_promptcache`."""

from mlx_promptcache.cli import main

if __name__ == "__main__":
    main()

"""`python -m lightning_gradtrace`: the same as the command `gradtrace`."""

from lightning_gradtrace.cli import main

if __name__ == "__main__":
    main()

"""`python -m wbdist` equals `wbdist`."""

from wbdist.cli import main

if __name__ == "__main__":
    main(prog_name="wbdist")

"""The program from a clone: `python run.py [job=...] [experiment=...] [key=value ...]`; installed, the same is the command `lesionbench`."""

from lesionbench.jobs.program import main

if __name__ == "__main__":
    main()

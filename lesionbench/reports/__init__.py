"""Reading finished runs: tables, statistics, HTML reports; reads run folders and nothing else."""

"""What runs have left behind, read and compared: tables, plots, the report. Nothing here takes part in a run."""

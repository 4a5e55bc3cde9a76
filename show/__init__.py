"""What shows: the report, one iteration in numbers, a trace in colours, tables."""

"""Methods compared over seeds and lam: the sweep and its directory, tables, report, charts, the demo."""

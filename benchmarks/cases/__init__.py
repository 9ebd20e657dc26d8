"""One module for each thing that is measured; see benchmarks/__main__.py for what a case is."""

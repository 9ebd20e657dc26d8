"""The dashboards' source: `python -m grafana.source` writes grafana/dashboards/*.json."""

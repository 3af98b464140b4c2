"""A training run as one page, OUTPUT/report.html: python -m minisd.report --run OUTPUT."""

"""The command line, by whom it is for: who is judged, who writes cases, who audits."""

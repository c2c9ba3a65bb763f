"""Judging and showing: measures and comparisons of explainers, the quality of label maps, pages and reports."""

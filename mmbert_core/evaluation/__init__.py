"""Predictions and labels (arrays) to numbers: metrics, intervals, thresholds, calibration, baselines. Knows no model.

Modules, each importing only those before it: predictions, class_counts, class_ranking, metrics, intervals, slices,
thresholds, calibration, baselines, decision.
"""

"""Predictions and labels (arrays) to numbers: metrics, intervals, thresholds, calibration, baselines. Knows no model.

Modules, each importing only those before it: thresholds, class_counts, class_ranking, metrics, intervals, slices,
calibration, baselines, decision.
"""

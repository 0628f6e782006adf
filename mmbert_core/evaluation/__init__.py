"""From arrays of predictions and labels: metrics, intervals, thresholds, calibration. Independent of the model.

Modules, each importing only those before it: thresholds, class_counts, class_ranking, temperature, metrics, intervals,
slices, calibration, baselines, convex_fit, blending, decision.
"""

"""Estimators with scikit-learn's protocol, which do not need scikit-learn.

Modules, each importing only those before it: parameters, classes, frame_roles, frame_files, stored, evaluation,
base, classifier.
"""

"""A model folder, and what is computed with it: predictions, attributions, importance, the prediction file.

Modules, each importing only those before it: precision, column_modules, model_files, model_folder, scoring,
attributions, new_rows, permutation_importance, output_file.
"""

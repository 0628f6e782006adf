"""Results of an evaluation as files: test_metrics.json, the predictions, pictures, report.html, the model card.

Modules, each importing only those before it: typed_json, report_schema, thinning, formatting, svg, charts,
confusion_chart, curves, plots, page_quality, page_probabilities, page_details, page, results, evaluated_rows,
run_sections, wrong_rows, blend_members, build, model_card, comparison_schema, comparison_page.
"""

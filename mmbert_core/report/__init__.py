"""Numbers to pages, pictures and files: report.html, the model card, test_metrics.json.

Modules, each importing only those before it: typed_json, report_schema, thinning, formatting, svg, charts,
confusion_chart, curves, plots, page_quality, page_probabilities, page_details, page, results, evaluated_rows,
run_sections, wrong_rows, build, model_card.
"""

"""Numbers to pages, pictures and files: report.html, the model card, test_metrics.json.

Modules, each importing only those before it: report_schema, formatting, charts, curves, plots, page_style,
page_quality, page_details, page, results, build, model_card.
"""

"""Files and folders that are complete or absent: checked JSON, checksums, locks.

Modules, each importing only those before it: schema, files, file_lock, folder_lock, manifest, encoder_files,
metrics_log.
"""

"""The key that a word was meant to be: synonyms of other programs first, then the nearest name."""

import difflib
from collections.abc import Sequence

MAX_COMPARED = 64  # characters of a word: difflib takes seconds for thousands of them
# The names that other trainers and libraries give to the same setting -> its name here.
SYNONYMS = {
    "text": "text_name", "texts": "text_name", "text_column": "text_name", "text_columns": "text_name", "text_col": "text_name", "text_cols": "text_name",
    "text_field": "text_name", "text_fields": "text_name", "text_feature": "text_name", "text_features": "text_name", "sentence": "text_name", "document": "text_name",
    "label": "label_name", "labels": "label_name", "label_column": "label_name", "label_col": "label_name", "label_field": "label_name",
    "target": "label_name", "target_column": "label_name", "target_col": "label_name", "target_name": "label_name", "class_column": "label_name", "y": "label_name",
    "id": "id_name", "id_column": "id_name", "id_col": "id_name", "row_id": "id_name", "index": "id_name", "index_column": "id_name", "id_field": "id_name",
    "numeric_columns": "tab_field_list", "numerical_columns": "tab_field_list", "numeric_cols": "tab_field_list", "numerical_cols": "tab_field_list",
    "num_columns": "tab_field_list", "num_cols": "tab_field_list", "numeric_features": "tab_field_list", "numerical_features": "tab_field_list",
    "number_columns": "tab_field_list", "numbers": "tab_field_list", "numeric": "tab_field_list", "numerical": "tab_field_list",
    "continuous_columns": "tab_field_list", "continuous_cols": "tab_field_list", "tabular_columns": "tab_field_list", "tab_columns": "tab_field_list", "features": "tab_field_list",
    "categorical_columns": "cat_field_list", "categorical_cols": "cat_field_list", "category_columns": "cat_field_list", "cat_columns": "cat_field_list",
    "cat_cols": "cat_field_list", "categorical_features": "cat_field_list", "categorical": "cat_field_list", "categories": "cat_field_list",
    "group": "group_name", "groups": "group_name", "group_column": "group_name", "group_col": "group_name", "group_by": "group_name",
    "train": "train_path", "train_file": "train_path", "train_data": "train_path", "training_data": "train_path", "train_csv": "train_path", "data": "train_path",
    "data_path": "train_path", "dataset": "train_path", "input": "train_path", "train_files": "train_path",
    "val": "val_path", "val_file": "val_path", "val_data": "val_path", "valid": "val_path", "valid_path": "val_path", "validation": "val_path", "validation_path": "val_path",
    "validation_file": "val_path", "validation_data": "val_path", "dev": "val_path", "dev_path": "val_path", "dev_file": "val_path", "eval_path": "val_path", "eval_file": "val_path",
    "test": "test_path", "test_file": "test_path", "test_data": "test_path", "test_csv": "test_path",
    "validation_split": "val_fraction", "val_split": "val_fraction", "valid_fraction": "val_fraction", "validation_fraction": "val_fraction", "val_size": "val_fraction",
    "validation_size": "val_fraction", "val_ratio": "val_fraction", "test_size": "val_fraction",
    "max_rows": "max_train_rows", "max_train_samples": "max_train_rows", "max_samples": "max_train_rows", "num_rows": "max_train_rows", "sample": "max_train_rows",
    "cache": "cache_path", "cache_dir": "cache_path", "cache_folder": "cache_path",
    "binary": "is_binary", "classes": "num_classes", "num_labels": "num_classes", "n_classes": "num_classes", "number_of_classes": "num_classes",
    "pos_label": "positive_label", "positive_class": "positive_label", "positive": "positive_label", "class_weight": "class_weights", "weights": "class_weights",
    "metric": "metric_choices", "metrics": "metric_choices", "eval_metrics": "metric_choices",
    "model": "encoder", "model_name": "encoder", "model_name_or_path": "encoder", "pretrained_model": "encoder", "pretrained_model_name_or_path": "encoder", "pretrained": "encoder",
    "bert": "encoder", "bert_model": "encoder", "backbone": "encoder", "base_model": "encoder", "encoder_name": "encoder", "encoder_path": "encoder",
    "hidden_dim": "hidden_common_dim", "hidden_size": "hidden_common_dim", "hidden": "hidden_common_dim",
    "max_len": "max_length", "maxlen": "max_length", "max_seq_length": "max_length", "max_seq_len": "max_length", "max_sequence_length": "max_length", "max_tokens": "max_length",
    "seq_len": "max_length", "sequence_length": "max_length", "block_size": "max_length", "chunks": "max_chunks",
    "epoch": "max_epochs", "epochs": "max_epochs", "num_epochs": "max_epochs", "n_epochs": "max_epochs", "num_train_epochs": "max_epochs", "train_epochs": "max_epochs",
    "batch": "batch_size", "bs": "batch_size", "train_batch_size": "batch_size", "per_device_train_batch_size": "batch_size", "per_gpu_train_batch_size": "batch_size",
    "gradient_accumulation_steps": "microbatches_per_step", "grad_accumulation": "microbatches_per_step", "accumulate_grad_batches": "microbatches_per_step",
    "accumulation_steps": "microbatches_per_step", "micro_batches": "microbatches_per_step", "microbatches": "microbatches_per_step",
    "learning_rate": "lr", "learningrate": "lr", "learn_rate": "lr", "encoder_lr": "lr", "bert_lr": "lr", "head_learning_rate": "head_lr", "classifier_lr": "head_lr",
    "wd": "weight_decay", "decay": "weight_decay", "l2": "weight_decay", "epsilon": "adam_epsilon", "eps": "adam_epsilon", "adam_eps": "adam_epsilon",
    "scheduler": "run_scheduler", "lr_scheduler": "run_scheduler", "warmup": "warmup_steps", "warmup_ratio": "warmup_steps", "num_warmup_steps": "warmup_steps", "warmup_proportion": "warmup_steps",
    "max_grad_norm": "gradient_clip_val", "grad_clip": "gradient_clip_val", "gradient_clip": "gradient_clip_val", "clip": "gradient_clip_val", "clip_grad_norm": "gradient_clip_val",
    "memory_limit": "memory_limit_mb", "eval_steps": "val_check_interval", "eval_every": "val_check_interval", "validate_every": "val_check_interval", "eval_interval": "val_check_interval",
    "metric_for_best_model": "early_stop_metric", "monitor": "early_stop_metric", "best_metric": "early_stop_metric", "patience": "early_stop_patience", "early_stopping_patience": "early_stop_patience",
    "early_stopping": "early_stop_patience", "threshold": "threshold_rule", "slices": "slice_columns",
    "output": "model_path", "output_dir": "model_path", "output_path": "model_path", "out": "model_path", "out_dir": "model_path", "output_folder": "model_path", "save_dir": "model_path",
    "save_path": "model_path", "run_dir": "model_path", "model_dir": "model_path", "model_folder": "model_path", "log_dir": "model_path", "folder": "model_path",
    "save_steps": "save_every", "checkpoint_every": "save_every", "save_total_limit": "keep_checkpoints", "save_top_k": "keep_checkpoints", "logging_steps": "log_every",
    "log_every_n_steps": "log_every", "random_state": "seed", "random_seed": "seed", "bf16": "precision", "dtype": "precision", "mixed_precision": "precision", "amp": "precision",
    "timeout": "timeout_seconds", "threads": "num_threads", "n_jobs": "num_threads", "num_workers": "num_threads", "cpus": "num_threads", "resume_from_checkpoint": "resume",
}  # fmt: skip


def nearest_name(word: str, names: Sequence[str]) -> str | None:
    """What `word` was probably meant to be: a synonym, else the first name that begins so, else the most similar."""
    word = word[:MAX_COMPARED].lower().replace("-", "_").replace(" ", "_").strip("_")
    if SYNONYMS.get(word) in names:
        return SYNONYMS[word]
    return next((name for name in names if word and name.startswith(word)), None) or next(iter(difflib.get_close_matches(word, names, n=1)), None)

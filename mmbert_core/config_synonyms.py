"""The key that an unknown key was probably meant to be: by synonyms from other programs, then by similar spelling."""

import difflib
from collections.abc import Sequence

MAX_COMPARED = 64  # characters of a word: difflib takes seconds for thousands of them
# Key -> the names that other trainers and libraries give to the same setting.
NAMES_ELSEWHERE = {
    "text_name": """
        text texts text_column text_columns text_col text_cols text_field text_fields text_feature
        text_features sentence document
    """,
    "label_name": """
        label labels label_column label_col label_field target target_column target_col target_name
        class_column y
    """,
    "id_name": "id id_column id_col row_id index index_column id_field",
    "tab_field_list": """
        numeric_columns numerical_columns numeric_cols numerical_cols num_columns num_cols numeric_features
        numerical_features number_columns numbers numeric numerical continuous_columns continuous_cols
        tabular_columns tab_columns features
    """,
    "cat_field_list": """
        categorical_columns categorical_cols category_columns cat_columns cat_cols categorical_features
        categorical categories
    """,
    "date_field_list": "date_columns date_cols dates datetime_columns datetimes timestamp_columns time_columns",
    "date_order": "dayfirst day_first date_format",
    "min_category_count": "min_frequency min_count rare_threshold count_threshold",
    "group_name": "group groups group_column group_col group_by",
    "train_path": "train train_file train_data training_data train_csv data data_path dataset input train_files",
    "val_path": """
        val val_file val_data valid valid_path validation validation_path validation_file validation_data
        dev dev_path dev_file eval_path eval_file
    """,
    "test_path": "test test_file test_data test_csv",
    "val_fraction": """
        validation_split val_split valid_fraction validation_fraction val_size validation_size val_ratio
        test_size
    """,
    "max_train_rows": "max_rows max_train_samples max_samples num_rows sample",
    "cache_path": "cache cache_dir cache_folder",
    "is_binary": "binary",
    "num_classes": "classes num_labels n_classes number_of_classes",
    "positive_label": "pos_label positive_class positive",
    "class_weights": "class_weight weights",
    "metric_choices": "metric metrics eval_metrics",
    "encoder": """
        model model_name model_name_or_path pretrained_model pretrained_model_name_or_path pretrained bert
        bert_model backbone base_model encoder_name encoder_path
    """,
    "hidden_common_dim": "hidden_dim hidden_size hidden",
    "max_length": """
        max_len maxlen max_seq_length max_seq_len max_sequence_length max_tokens seq_len sequence_length
        block_size
    """,
    "max_chunks": "chunks",
    "max_epochs": "epoch epochs num_epochs n_epochs num_train_epochs train_epochs",
    "batch_size": "batch bs train_batch_size per_device_train_batch_size per_gpu_train_batch_size",
    "microbatches_per_step": """
        gradient_accumulation_steps grad_accumulation accumulate_grad_batches accumulation_steps
        micro_batches microbatches
    """,
    "lr": "learning_rate learningrate learn_rate encoder_lr bert_lr",
    "head_lr": "head_learning_rate classifier_lr",
    "head_first": "lp_ft linear_probe linear_probing freeze_encoder fit_head",
    "weight_decay": "wd decay l2",
    "adam_epsilon": "epsilon eps adam_eps",
    "layer_decay": "llrd layer_lr_decay layerwise_lr_decay layerwise_decay lr_decay",
    "run_scheduler": "scheduler",
    "schedule": "lr_scheduler lr_scheduler_type lr_schedule",
    "warmup_steps": "warmup warmup_ratio num_warmup_steps warmup_proportion",
    "aux_loss_weight": "aux_weight auxiliary_loss_weight auxiliary_weight",
    "ema_decay": "ema ema_rate moving_average weight_averaging swa",
    "gradient_clip_val": "max_grad_norm grad_clip gradient_clip clip clip_grad_norm",
    "memory_limit_mb": "memory_limit",
    "val_check_interval": "eval_steps eval_every validate_every eval_interval",
    "early_stop_metric": "metric_for_best_model monitor best_metric",
    "early_stop_patience": "patience early_stopping_patience early_stopping",
    "threshold_rule": "threshold",
    "slice_columns": "slices",
    "model_path": """
        output output_dir output_path out out_dir output_folder save_dir save_path run_dir model_dir
        model_folder log_dir folder
    """,
    "save_every": "save_steps checkpoint_every",
    "keep_checkpoints": "save_total_limit save_top_k",
    "log_every": "logging_steps log_every_n_steps",
    "seed": "random_state random_seed",
    "precision": "bf16 dtype mixed_precision amp",
    "timeout_seconds": "timeout",
    "num_threads": "threads n_jobs num_workers cpus",
    "resume": "resume_from_checkpoint",
}
SYNONYMS = {word: key for key, words in NAMES_ELSEWHERE.items() for word in words.split()}


def nearest_name(word: str, names: Sequence[str]) -> str | None:
    """The one of `names` that `word` probably means: by synonym, else the first that starts so, else the nearest."""
    word = word[:MAX_COMPARED].lower().replace("-", "_").replace(" ", "_").strip("_")
    if SYNONYMS.get(word) in names:
        return SYNONYMS[word]
    longer = next((name for name in names if word and name.startswith(word)), None)
    return longer or next(iter(difflib.get_close_matches(word, names, n=1)), None)

"""The main job on real reviews with a real encoder. Needs the data and the encoder:

MMBERT_REVIEWS=folder-of-train-val-test.csv MMBERT_ENCODER=folder-of-MiniLM pytest -m slow tests/real_data -s
"""

import json
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import average_precision_score, f1_score, roc_auc_score

from tests.support import tiny


@pytest.mark.slow
def test_reviews_reach_the_expected_auroc_and_the_metrics_match_the_file(tmp_path):
    data, encoder = Path(os.environ["MMBERT_REVIEWS"]), os.environ["MMBERT_ENCODER"]
    files = [word for name in ("train", "val", "test") for word in (f"--{name}_path", str(data / f"{name}.csv"))]
    words = ["train.py", "examples/womens_reviews.yaml", *files, "--encoder", encoder]
    done = tiny.torchrun(2, [*words, "--model_path", str(tmp_path / "run")], timeout=2400)
    assert done.returncode == 0, done.stderr[-6000:]
    [folder] = (tmp_path / "run").glob("multimodal_bert-*")
    metrics = json.loads((folder / "test_metrics.json").read_text())
    table = pd.read_csv(folder / "test_result_0.tsv", sep="\t", dtype={"row_id": str})
    print(done.stdout, json.loads((tmp_path / "run/train_results.json").read_text()))

    source = pd.read_csv(data / "test.csv", dtype=str, keep_default_na=False)
    assert table["row_id"].tolist() == source["row_id"].tolist()
    assert table["label"].astype(str).tolist() == source["Recommended IND"].tolist()
    label, prob = table["label"].to_numpy(), table["prob"].to_numpy(dtype=np.float32).astype(np.float64)
    expected = {
        "auroc": roc_auc_score(label, prob),
        "average_precision_class_1": average_precision_score(label, prob),
        "average_precision_class_0": average_precision_score(1 - label, -prob),
        "f1_macro": f1_score(label, table["pred"], average="macro"),
    }
    for name, value in expected.items():
        assert metrics[f"test/{name}"] == pytest.approx(value, abs=1e-6), name
    # nine runs with other seeds or dropout gave .933 to .961, median .956; a bag of words and word pairs gives .946
    assert metrics["test/auroc"] >= 0.945

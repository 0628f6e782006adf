"""The modules of a model that read columns, and its blend, built from the statistics of the training rows."""

import numpy as np

from mmbert_core.config import Config
from mmbert_core.data.features import Features
from mmbert_core.evaluation.blending import READ_COLUMNS, READ_WORDS, BlendRecord
from mmbert_core.model.blend import Blend, MemberInputs
from mmbert_core.model.column_features import LinearColumnFeatures, NumberFeatures
from mmbert_core.model.fusion import READ_VALUES
from mmbert_core.model.tabular_encoder import TabAE
from mmbert_core.model.wide_columns import WideColumns


def build_tabular_encoder(config: Config, features: Features) -> TabAE | None:
    """The tabular encoder; None without columns."""
    if not features.num_numbers and not features.cardinalities:
        return None
    return TabAE(
        features.num_numbers,
        features.cardinalities,
        hidden_common_dim=None if config.fusion in READ_VALUES else config.hidden_common_dim,
        means=features.means,
        stds=features.stds,
        number_features=build_number_features(features) if config.column_encoding == "piecewise_linear" else None,
        learns_unseen=features.pooled is not None,
    )


def build_number_features(features: Features) -> NumberFeatures:
    """Scaled numbers, indicators and bins; without edges in `features`, standardised numbers and no bins."""
    if features.scales is not None and features.edges is not None:
        return NumberFeatures(
            centers=features.medians,
            scales=features.scales,
            has_indicator=features.has_indicator,
            edges=features.edges,
        )
    num_columns = len(features.number_names)
    scales = np.minimum(1 / np.array(features.stds[:num_columns]), np.finfo(np.float32).max)
    return NumberFeatures(
        centers=features.means[:num_columns], scales=scales.tolist(), has_indicator=features.has_indicator
    )


def build_linear_column_features(features: Features) -> LinearColumnFeatures | None:
    """Scaled numbers, indicators, bins and one-hot categories; None without columns."""
    if not features.num_numbers and not features.cardinalities:
        return None
    return LinearColumnFeatures(build_number_features(features), features.cardinalities)


def build_wide_columns(config: Config, features: Features) -> WideColumns | None:
    """The linear path from the columns to the logits; None where it is not asked for, or without columns."""
    linear = build_linear_column_features(features) if config.wide_columns else None
    return None if linear is None else WideColumns(linear, config.num_classes)


def build_blend(config: Config, features: Features, record: BlendRecord) -> Blend:
    """The blend of a model without the values of its members' tensors."""
    members = [
        MemberInputs(tensor_name(member.name), member.weight, member.name in READ_WORDS, member.name in READ_COLUMNS)
        for member in record.members
        if member.weight
    ]
    return Blend(
        members,
        num_classes=config.num_classes,
        temperature=record.temperature,
        column_features=build_linear_column_features(features),
    )


def tensor_name(member: str) -> str:
    """The name of a member's tensors."""
    return member.replace(" + ", "_and_")

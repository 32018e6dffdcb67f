"""The direction of a metric, from its name: whether low or high is better."""

import re

from flaxckpt.errors import SettingError

_LOWER = frozenset(
    """
    loss error err cost energy nll negative_log_likelihood neg_log_likelihood
    negative_elbo neg_elbo log_loss logloss crossentropy cross_entropy xent
    perplexity ppl bpb bpc bpd bits_per_byte bits_per_char bits_per_dim
    binary_crossentropy bce categorical_crossentropy sparse_categorical_crossentropy
    mean_squared_error mse root_mean_squared_error rmse nrmse mean_absolute_error mae
    mean_absolute_percentage_error mape smape mase mean_squared_logarithmic_error msle
    rmsle huber log_cosh logcosh hinge squared_hinge categorical_hinge poisson
    kl_divergence kullback_leibler_divergence kld kl divergence
    false_positives false_negatives fpr fnr error_rate false_positive_rate
    false_negative_rate brier brier_score ece calibration_error eer hamming_loss
    wer cer ter word_error_rate character_error_rate fid fid_score kid lpips fvd
    regret wasserstein chamfer edit_distance levenshtein
    """.split()
)
_HIGHER = frozenset(
    """
    accuracy acc binary_accuracy categorical_accuracy sparse_categorical_accuracy
    top_k_categorical_accuracy sparse_top_k_categorical_accuracy top1 top5 top_1 top_5
    top_k auc roc_auc pr_auc auroc auprc average_precision ap map precision recall f1
    f1_score f1_macro f1_micro f1_weighted fbeta fbeta_score dice dice_score jaccard
    iou mean_iou miou io_u mean_io_u binary_io_u one_hot_io_u one_hot_mean_io_u
    sensitivity specificity sensitivity_at_specificity specificity_at_sensitivity
    precision_at_recall recall_at_precision true_positives true_negatives tpr tnr
    true_positive_rate true_negative_rate mcc matthews_corrcoef kappa cohen_kappa
    cosine_similarity similarity r2 r2_score explained_variance pearson_correlation
    concordance_correlation correlation pearson spearman pearsonr spearmanr
    bleu sacrebleu rouge rouge1 rouge2 rougel rougelsum meteor chrf cider
    exact_match em pass_rate log_likelihood elbo likelihood score inception_score
    psnr ssim ms_ssim ndcg mrr hit_rate reward rewards return returns episode_reward
    episode_return episodic_return success success_rate win_rate elo profit
    """.split()
)
_SPLITS = re.compile(r"^(?:val|valid|validation|test|eval|dev|train|training)[_\-.:/ ]")
_COUNTER = re.compile(r"_\d+$")
_NEGATIONS = frozenset("neg negative negated minus inverse inv non not".split())


def mode_of(monitor: str, mode: str, *, is_needed: bool = True) -> str:
    """Return the mode of a monitor: as given, or by the name if `mode` is `"auto"`.

    Returns:
        `"min"` or `"max"`; `"auto"` if the direction is neither known nor needed.

    Raises:
        SettingError: If `mode` is none of the three, or the direction is needed but not
            known.
    """
    if mode not in ("auto", "min", "max"):
        raise SettingError("mode", mode, 'pass "auto", "min" or "max".')
    known = mode if mode != "auto" else direction(monitor) or "auto"
    if is_needed and known == "auto":
        raise SettingError(
            "monitor",
            monitor,
            "whether this metric is better low or high is not known by its name. "
            'Pass mode="min" or mode="max".',
        )
    return known


def direction(metric: str) -> str | None:
    """Tell whether a metric is better low or high.

    A known name may follow the name of a data split (`val_loss`), a path (`eval/loss`)
    or other words (`policy_loss`, `mean_reward`). The counter that Keras appends may
    follow it (`auc_1`).

    Args:
        metric: A key of `logs`.

    Returns:
        `"min"`, `"max"`, or None for a name whose direction is not known.

    Example:
        >>> direction("val_loss"), direction("eval/mean_reward"), direction("beta")
        ('min', 'max', None)
    """
    name = metric.rsplit("/", 1)[-1].lower().replace("-", "_").replace(" ", "_")
    name = _SPLITS.sub("", name)
    parts = _COUNTER.sub("", name).split("_")
    return _of_ending(parts) or ("max" if name in _HIGHER else None)


def _of_ending(parts: list[str]) -> str | None:
    # The longest known ending decides: brier_score is better low, other scores high.
    for start in range(len(parts)):
        ending = "_".join(parts[start:])
        if ending not in _LOWER and ending not in _HIGHER:
            continue
        if _NEGATIONS & set(parts[:start]):
            return None  # it negates the metric, or names negative samples
        if ending == "score" and start:
            return _of_ending(parts[:start]) or "max"
        return "min" if ending in _LOWER else "max"
    return None

"""Keys without effect are refused: as flags always, in files where the file itself stands so."""

import pytest

from config.load import dump_config, load_config, parse_config
from config.needs import NEEDS
from config.typed import all_paths
from core.errors import ConfigError


def parse(*argv):
    return parse_config([str(word) for word in argv], "train.py")


IDLE = [
    ("--init_fresh labels", "init_from"),
    ("--data.source images --data.data_path x --data.cached_path y", "data.source latents or npz"),
    ("--data.npz_contents latent", "data.source npz"),
    ("--data.data_path x", "data.source images"),
    ("--data.shuffle_window 3", "data.order shards"),
    ("--data.val_cached_path x", "train.val_every above 0"),
    ("--data.val_data_path x", "train.val_every above 0, data.source images"),
    ("--train.num_val_samples 8", "train.val_every above 0"),
    ("--train.sample_every 0 --train.num_grid_samples 8", "train.sample_every above 0"),
    ("--train.keep_every 8", "train.keep_last above 0"),
    ("--parallel.shard_size 1", "parallel.strategy fsdp"),
    ("--evaluation.reference x.npz", "evaluation.every above 0"),
    ("--evaluation.num_samples 8", "evaluation.every above 0"),
    ("--evaluation.classifier x", "evaluation.every above 0 and evaluation.features digits"),
    (
        "--evaluation.every 5 --evaluation.reference x --evaluation.classifier x",
        "evaluation.features digits",
    ),
    ("--model.feed_forward.name dense --model.moe_every 1", "other than dense"),
    ("--model.context_start 1", "model.context_tokens"),
    (
        "--model.feed_forward.intermediate_size 64 --model.feed_forward.hidden_split 2",
        "model.feed_forward.intermediate_size null",
    ),
    (
        "--model.feed_forward.rounding up --model.feed_forward.round_share_first true",
        "model.feed_forward.rounding down",
    ),
    ("--model.num_classes 0 --model.label_dropout 0.2", "model.num_classes above 0"),
    ("--model.intermediate_size 64 --model.mlp_ratio 2", "model.intermediate_size null"),
    (
        "--model.feed_forward.name expert_choice --model.feed_forward.threshold_decay 0.5",
        "model.feed_forward.capacity_predictor true",
    ),
    ("--model.feed_forward.fixed_threshold 0.4", "model.feed_forward.inference fixed"),
    (
        "--model.feed_forward.name deepseek --model.feed_forward.zero_masked_groups true",
        "model.feed_forward.top_k_groups below num_groups",
    ),
    ("--objective.time_mean 0", "objective.time_distribution logit_normal"),
    ("--objective.time_mode_scale 1", "objective.time_distribution mode"),
    ("--objective.t_eps 0.1", "objective.prediction x"),
    ("--model.qk_norm rmsnorm --model.qk_norm_eps 1e-6", "model.qk_norm layernorm"),
    ("--objective.name ddpm --sampling.time_shift 3", "objective.name flow"),
    ("--sampling.sampler dopri5 --sampling.time_shift 3", "a sampler with fixed steps"),
    ("--objective.train_eps 0.1", "objective.path vp, or objective.prediction noise or score"),
    ("--objective.sample_eps 0.1", "or a sampler of the SDE"),
    ("--objective.name ddpm --objective.variance_type fixed_small", "model.learn_sigma false"),
    ("--sampling.cfg_interval [0.1,0.5]", "a sampling.cfg_scale other than 1"),
    ("--sampling.cfg_pooling joint", "a sampling.cfg_scale other than 1"),
    ("--sampling.sampler dopri5 --sampling.num_steps 9", "a sampler with fixed steps"),
    ("--sampling.atol 1e-3", "a sampler with tolerances"),
    ("--sampling.overshoot true", "chooses its steps"),
    ("--sampling.ddim_eta 0", "sampling.sampler ddim"),
    ("--sampling.clip_denoised true", "objective.name ddpm"),
    ("--sampling.last_step mean", "a sampler of the SDE: euler_maruyama or stochastic_heun"),
    (
        "--sampling.sampler euler_maruyama --sampling.last_step none --sampling.last_step_size 0.1",
        "a sampling.last_step",
    ),
]


@pytest.mark.parametrize(("argv", "needed"), IDLE)
def test_a_flag_without_effect_is_refused(argv, needed):
    with pytest.raises(ConfigError) as caught:
        parse(*argv.split())
    key = argv.split()[-2]
    assert str(caught.value).startswith(f"{key}: has no effect here; it needs ")
    assert needed in str(caught.value)


@pytest.mark.parametrize(
    "argv",
    [
        "--data.val_cached_path x --train.val_every 5 --train.num_val_samples 8",
        "--data.val_cached_path null --train.val_every 0",
        "--sampling.sampler dopri5 --sampling.atol 1e-3 --sampling.overshoot true",
        "--sampling.sampler euler_maruyama --sampling.last_step_size 0.1",
        "--objective.sample_eps 0.1 --sampling.sampler euler_maruyama",
        "--objective.time_distribution logit_normal --objective.time_mean 0",
        "--model.feed_forward.inference fixed --model.feed_forward.fixed_threshold 0.4",
        "--model.feed_forward.name race --model.feed_forward.threshold_decay 0.99",
    ],
)
def test_a_flag_with_effect_is_taken(argv):
    parse(*argv.split())


def test_the_table_names_keys_that_there_are():
    known = set(all_paths())
    assert all(path in known for need in NEEDS for path in need.paths())


def test_a_file_is_refused_for_what_it_leaves_without_effect_itself(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("train: {num_val_samples: 8}\n")
    with pytest.raises(ConfigError, match=rf"{path}: train\.num_val_samples: has no effect here"):
        parse("--config", path)
    flags = ["--train.val_every", 5, "--data.val_cached_path", "x"]
    assert parse("--config", path, *flags).train.num_val_samples == 8
    path.write_text("train: {num_val_samples: 256}\n")  # the default
    parse("--config", path)


def test_flags_and_other_files_may_take_the_effect_away(tmp_path):
    base, own = tmp_path / "base.yaml", tmp_path / "own.yaml"
    base.write_text(
        "data: {val_cached_path: x}\ntrain: {val_every: 5, num_val_samples: 8}\n"
        "sampling: {sampler: dopri5, atol: 1.0e-4}\n"
    )
    parse("--config", base, "--train.val_every", 0, "--sampling.sampler", "euler")
    own.write_text("base: base.yaml\ntrain: {val_every: 0}\nsampling: {sampler: heun}\n")
    assert parse("--config", own).sampling.atol == 1e-4


def test_the_record_of_a_run_loads_whatever_is_switched_off(tmp_path):
    """Every key stands in it, with effect or without."""
    flags = [
        "--data.val_cached_path",
        "x",
        "--train.val_every",
        "5",
        "--train.num_val_samples",
        "8",
    ]
    record = tmp_path / "config.yaml"
    record.write_text(dump_config(parse(*flags, "--train.num_grid_samples", 4)))
    off = parse("--config", record, "--train.val_every", 0, "--train.sample_every", 0)
    record.write_text(dump_config(off))
    again = parse("--config", record)
    assert (again.train.num_grid_samples, again.data.val_cached_path) == (4, "x")
    assert load_config(record) == again

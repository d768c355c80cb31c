"""Official YAML files become ours; what is left out is said."""

import json

import pytest
import yaml

from config.convert import convert
from config.load import parse_config
from core.errors import UserError

PUBLISHED = {
    "basic": {
        "exp_name": "000_DiffMoE_S_E16_Flow",
        "results_dir": "exps/",
        "data_path": "imagenet/train",
        "global_seed": 1234,
        "epochs": 1000,
        "log_every": 100,
        "ckpt_every": 50000,
        "rf": True,
        "rf_ori": False,
        "accum_iter": 1,
        "clip_grad_norm": None,
        "image_size": 128,
        "global_batch_size": 512,
        "num_workers": 16,
        "timestep_start": 0,
        "timestep_end": 1000,
        "vae_path": "stabilityai/sd-vae-ft-mse",
        "dataset_config": {
            "target": "dataset.dataset_cache.CachedFolder",
            "params": {"root": "cache/"},
        },
    },
    "model": {
        "ckpt": None,
        "target": "models.models_DiffMoE.DiT",
        "params": {
            "input_size": 16,
            "num_classes": 1000,
            "patch_size": 2,
            "depth": 12,
            "hidden_size": 384,
            "num_heads": 16,
            "mlp_ratio": 4,
            "use_swiglu": False,
            "MoE_config": {
                "n_shared_experts": 0,
                "num_experts": 16,
                "capacity": 1,
                "init_MoeMLP": False,
                "interleave": True,
            },
            "CapacityPred_loss_weight": 1,
        },
    },
    "optim": {"base_learning_rate": 0.0001, "weight_decay": 0, "betas": [0.9, 0.999]},
    "lr_sheduler": {"warmup": None, "train_epoch": None},
}


def changed(**sections):
    old = json.loads(json.dumps(PUBLISHED))
    for section, keys in sections.items():
        old[section] |= keys
    return old


def test_the_published_file_becomes_a_valid_config(tmp_path):
    new, reports = convert(PUBLISHED)
    path = tmp_path / "new.yaml"
    path.write_text(yaml.safe_dump(new))
    config = parse_config(["--config", str(path)], "train.py")
    model = config.model
    assert (model.input_size, model.num_heads, model.hidden_size) == (16, 16, 384)
    assert (model.feed_forward.name, model.feed_forward.num_experts) == ("diffmoe", 16)
    assert model.feed_forward.capacity_loss_weight == 1
    assert (config.objective.name, config.seed) == ("flow", 1234)
    assert (config.train.global_batch_size, config.data.image_size) == (512, 128)
    assert config.run_dir == "runs/000_DiffMoE_S_E16_Flow"
    assert [line.split(":")[0] for line in reports] == [
        "basic.data_path",
        "basic.epochs",
        "basic.dataset_config.params.root",
    ]


def test_ddpm_and_dense():
    old = changed(basic={"rf": False}, model={"target": "models.models_DiT.DiT"})
    del old["model"]["params"]["MoE_config"]
    new, _ = convert(old)
    assert new["objective"] == {"name": "ddpm"}
    assert new["model"]["feed_forward"] == {"name": "dense"}


@pytest.mark.parametrize(
    ("sections", "wanted"),
    [
        ({"basic": {"clip_grad_norm": 1.0}}, "basic.clip_grad_norm: 1.0 has no counterpart"),
        ({"basic": {"accum_iter": 2}}, "basic.accum_iter: 2 accumulation follows from"),
        ({"basic": {"rf_ori": True}}, "basic.rf_ori: True has no counterpart"),
        ({"lr_sheduler": {"warmup": 5}}, "lr_sheduler.warmup: 5 has no counterpart"),
        ({"basic": {"my_key": 3}}, "basic.my_key: 3 has no counterpart"),
        ({"model": {"ckpt": "a.pt"}}, "model.ckpt: 'a.pt' has no counterpart"),
    ],
)
def test_what_is_left_out_is_reported(sections, wanted):
    assert any(line.startswith(wanted) for line in convert(changed(**sections))[1])


@pytest.mark.parametrize(
    ("old", "wanted"),
    [
        ({"seed": 1}, "not an official config"),
        (changed(model={"target": "os.system"}), "model.target: unknown 'os.system'; known"),
        (changed(model={"params": {"widht": 3}}), "official constructor: unknown 'widht'"),
    ],
)
def test_other_files_are_refused(old, wanted):
    with pytest.raises(UserError, match=wanted):
        convert(old)

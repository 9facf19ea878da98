"""What NNI's repository has about quantization, in its last state (3.0): tests, tutorials, examples, documents."""

from __future__ import annotations

from tests.compat.coming_from import Row

TESTS = "test/algo/compression"
RUNS, DIFFERS, REFUSED = "runs", "differs", "refused"
_DEEPSPEED = "DeepSpeed's engine owns the parameters; TorchEvaluator with DistributedDataParallel, or torch's FSDP2"
_NAN = "where its learning rate of 0.01 diverges, training stops with NonFiniteError and does not go on with NaN"
_TENSORRT = "the classes are there; ONNX Runtime on the CPU takes TensorRT's place"

_ROWS = [
    *(
        (f"{TESTS}/quantization/{name}_test.py, {net}", what, verdict, why, test)
        for name, what, verdict, why in (
            ("qat", "QAT of three convolutions with batch norms and two linear layers", RUNS, ""),
            ("lsq", "the same by LSQ", RUNS, ""),
            ("ptq", "the same after training", RUNS, "the weights are not trained, only the ranges are measured"),
            ("dorefa", "the same by DoReFa", DIFFERS, _NAN),
            ("bnn", "the same with one bit", RUNS, ""),
        )
        for net, test in (("torch", "test_torch_model"), ("Lightning", "test_lightning_model"))
    ),
    (f"{TESTS}/utils/test_evaluator.py", "hooks, tasks and losses", RUNS, "", "test_patches_and_hooks"),
    (
        f"{TESTS}/utils/test_scaling.py",
        "scales for blocks of a tensor",
        DIFFERS,
        "Scaling is for NNI's own use; its granularities are endings of spec strings",
        "test_granularities",
    ),
    (
        f"{TESTS}/base/test_compressor.py",
        "a quantizer continues a pruner",
        DIFFERS,
        "a quantizer continues one of its class; pruning is left to torch.nn.utils.prune",
        "test_a_quantizer_continues_another_of_its_class",
    ),
    (
        f"{TESTS}/base/test_setting.py",
        "which setting of a target holds",
        DIFFERS,
        "canonicalize_settings is for NNI's own use; config lists have the same effect",
        "test_a_setting_of_a_target_beats_the_shared_one",
    ),
    (
        f"{TESTS}/base/test_wrapper.py",
        "numbers of a wrapper set by hand",
        DIFFERS,
        "a QWrapper takes ModuleWrapper's place; update_calibration_config sets the numbers",
        "test_a_wrapper_with_numbers_set_by_hand",
    ),
    (
        f"{TESTS}/base/test_fused_wrapper.py",
        "layers fused with batch norms",
        DIFFERS,
        "a FusedPart takes IdentityModuleWrapper's place",
        "test_layers_with_their_batch_norms_are_registered",
    ),
    (
        f"{TESTS}/test_fusion_compress.py",
        "distillation, pruning and quantization at once",
        REFUSED,
        "no pruning; torchquant.training.fit(model, batches, teacher=...) distils",
        "test_what_of_nni_is_refused_says_why",
    ),
    (
        "test/training_service/nnitest/test_quantize_model_speedup.py",
        "speed-up with TensorRT",
        DIFFERS,
        _TENSORRT,
        "test_speed_up_with_a_calibration_config",
    ),
    ("examples/tutorials/quantization_quick_start.py", "QAT of MNIST", RUNS, "", "test_quick_start"),
    (
        "the quick start of 2.x",
        "the same with optimizer and dummy_input",
        RUNS,
        "",
        "test_quick_start_of_2_x",
    ),
    (
        "examples/tutorials/quantization_bert_glue.py",
        "LSQ, QAT and PTQ of BERT by a Trainer",
        RUNS,
        "Transformers 5 calls tokenizer= processing_class=, and evaluation_strategy= eval_strategy=",
        "test_tutorial_on_bert",
    ),
    (
        "examples/tutorials/quantization_speedup.py, mode 1",
        "calibration data to an engine",
        DIFFERS,
        _TENSORRT,
        "test_speed_up_with_calibration_data",
    ),
    (
        "examples/tutorials/quantization_speedup.py, mode 2",
        "a calibration config to an engine",
        DIFFERS,
        f"{_TENSORRT}; TorchEvaluator has no predicting_func, evaluating_func is its name, there too",
        "test_speed_up_with_a_calibration_config",
    ),
    *(
        (f"examples/compression/quantization/{name}_example.py", what, RUNS, why, f"test_example_{name}")
        for name, what, why in (
            ("qat", "QAT of MNIST with fused batch norms", ""),
            ("lsq", "LSQ of MNIST", ""),
            ("ptq", "PTQ of MNIST", ""),
            ("dorefa", "DoReFa of MNIST", "gradients are quantized only with gradient_bits"),
            ("bnn", "binary VGG", ""),
        )
    ),
    *(
        (f"examples/model_compress/quantization/{name}.py", what, REFUSED, _DEEPSPEED, f"test_{test}")
        for name, what in (
            ("quantization_with_deepspeed", "QAT by DeepSpeed"),
            ("bert_quantization_with_ds", "BERT by DeepSpeed"),
        )
        for test in ("what_of_nni_is_refused_says_why",)
    ),
    *(
        (f"the document on quantization, block on {name}", what, RUNS, "", f"test_block_{name}")
        for name, what in (
            ("naive", "8-bit weights"),
            ("qat", "QAT with a start step"),
            ("folding", "batch norms folded"),
            ("schemes", "schemes and data types"),
            ("distributed", "DistributedDataParallel"),
            ("lsq", "learned steps"),
            ("dorefa", "DoReFa"),
            ("bnn", "binary VGG"),
            ("observer", "post-training"),
        )
    ),
]

ROWS = [Row(*row) for row in _ROWS]

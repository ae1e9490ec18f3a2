"""Private names of torch, timm, accelerate and numpy that tlcli uses, and why there is no public one.

A test checks that each is still there, and that no other is used: a new release that takes one away fails
there first, by name.
"""

BORROWED: dict[str, str] = {
    "torch._fused_adamw_": "Adam of many tensors in one call; torch.optim makes one of an optimiser's only",
    "torch._standard_gamma": "a Beta draw from a generator; torch.distributions takes none",
    "torch.cpu._is_amx_tile_supported": "whether bf16 products are fast; not public",
    "torch.cpu._is_avx512_bf16_supported": "likewise",
    "torch.fx.graph_module._copy_attr": "puts a tensor that no operation uses into a suffix too",
    "torch.fx: _tensor_constant": "the prefix of names that tracing gives to tensors made from no parameter",
    "torch.compile: _orig_mod": "how names begin in the checkpoint of a compiled network",
    "torch.nn.Module._modules": "replaces the modules of a part by copies with modes of their own",
    "torch.nn.Module._buffers": "finds the constants of a traced part",
    "torch.nn.Module._non_persistent_buffers_set": "keeps them out of its state dict",
    "torchvision.models.feature_extraction._set_default_tracer_kwargs": "the leaf modules it traces with",
    "timm.models._builder": "whether build_model_with_cfg takes pretrained_model_args; timm 1.0.20 does not",
    "timm.models.regnet._filter_fn": "one of the names of timm's filters of foreign checkpoints",
    "timm.models.densenet._filter_torchvision_pretrained": "likewise",
    "timm.optim.lookahead.Lookahead._base_optimizer": "the name of the optimiser that Lookahead wraps",
    "accelerate.state.AcceleratorState._reset_state": "several trainings in one process, with other types",
    "accelerate.state.PartialState._reset_state": "likewise",
    "numpy: _core": "in how a pickle names numpy's numbers since numpy 2",
    "accelerate: _is_accelerate_prepared": "its mark on a network, which would train without AMP again",
}
"""Name -> why. What is not an attribute of a module is `library: name`."""

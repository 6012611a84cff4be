"""GRPOConfig fields a configuration cannot set, and what to do instead: gone from TRL, ours, or refused.

Fields of the installed TRL are read from TRL itself; only what it has no more must be remembered here: names
that configurations for older TRL and transformers use and that are no field of TRL 1.15, transformers 5.17.
"""

_PROMPTS = "prompts are no longer truncated: filter the data by length; max_completion_length remains"
_DATALOADER = "set grpo.accelerator_config: {%s: …}"
_CPU_ONLY = "set grpo.use_cpu: true, or leave it out: without a GPU the run is on the CPU"
_FOLDER = "the run folder is runs/<run.name>; set run.name and run.output_root"

GONE: dict[str, str] = {
    # TRL
    "max_prompt_length": _PROMPTS,
    "max_length": f"set max_completion_length; {_PROMPTS}",
    "max_new_tokens": "set grpo.max_completion_length",
    "use_liger_loss": "set head.impl: memhead; the loss stays TRL's",
    "vllm_device": "set grpo.vllm_mode: colocate (same GPU) or server (its own)",
    "vllm_dtype": "set model.dtype",
    "vllm_max_model_len": "set grpo.vllm_max_model_length",
    "vllm_enable_prefix_caching": "remove it: vLLM decides by itself",
    "vllm_guided_decoding_regex": "set grpo.vllm_structured_outputs_regex",
    "wandb_log_unique_prompts": "set grpo.log_unique_prompts",
    "ref_model_update_steps": "set grpo.ref_model_sync_steps",
    "epsilon_low": "set grpo.epsilon (the lower bound) and grpo.epsilon_high",
    # transformers
    "warmup_ratio": "set grpo.warmup_steps: a value below 1 is a share of all steps",
    "logging_dir": _FOLDER,
    "overwrite_output_dir": _FOLDER,
    "evaluation_strategy": "set run.evaluation.every",
    "no_cuda": _CPU_ONLY,
    "use_mps_device": "remove it: the device is found by itself",
    "per_gpu_train_batch_size": "set grpo.per_device_train_batch_size",
    "per_gpu_eval_batch_size": "set run.evaluation.batch_size",
    "adafactor": "set grpo.optim: adafactor",
    "group_by_length": "set grpo.train_sampling_strategy: group_by_length",
    "save_safetensors": "remove it: weights are always saved as safetensors",
    "include_inputs_for_metrics": "set grpo.include_for_metrics: [inputs]",
    "include_tokens_per_second": "remove it: metrics.jsonl has the time of each step and its lengths",
    "dispatch_batches": _DATALOADER % "dispatch_batches",
    "split_batches": _DATALOADER % "split_batches",
    "torchdynamo": "set grpo.torch_compile_backend",
    "fp16_backend": "set grpo.fp16 or grpo.bf16",
    "fp16_opt_level": "set grpo.fp16 or grpo.bf16",
    "half_precision_backend": "set grpo.fp16 or grpo.bf16",
    "use_ipex": "remove it: transformers has dropped Intel's extension",
    "jit_mode_eval": "set grpo.torch_compile",
    "tpu_num_cores": "remove it: launch with accelerate",
    "tpu_metrics_debug": "set grpo.debug",
    "ray_scope": "remove it: it belonged to hyperparameter search",
    "past_index": "remove it",
    "mp_parameters": "remove it: launch with accelerate",
    "fsdp_min_num_params": "set grpo.fsdp_config: {min_num_params: …}",
    "fsdp_transformer_layer_cls_to_wrap": "set grpo.fsdp_config: {transformer_layer_cls_to_wrap: …}",
    "push_to_hub_model_id": "set grpo.hub_model_id",
    "push_to_hub_organization": "set grpo.hub_model_id: organisation/name",
    "push_to_hub_token": "log in with `hf auth login`; keep tokens out of files",
}

OWNED: dict[str, str] = {  # name -> where it is set instead
    "output_dir": "run.output_root and run.name",
    "run_name": "run.name",
    "seed": "run.seed",
    "report_to": "tracking.report_to",
    "logging_steps": "tracking.logging_every",
    "logging_strategy": "tracking.logging_every",
    "logging_first_step": "tracking.logging_every",
    "log_completions": "tracking.print_completions",
    "num_completions_to_print": "tracking.print_completions",
    "disable_tqdm": "nothing: the progress bar is the run's own",
    "save_steps": "run.save_every",
    "save_strategy": "run.save_every",
    "eval_strategy": "run.evaluation.every",
    "eval_steps": "run.evaluation.every",
    "eval_on_start": "nothing: the accuracy is always measured before and after",
    "per_device_eval_batch_size": "run.evaluation.batch_size",
    "do_train": "nothing: the run trains",
    "do_eval": "run.evaluation",
    "do_predict": "run.evaluation",
    "resume_from_checkpoint": "nothing here: give --resume on the command line",
    "gradient_checkpointing": "model.gradient_checkpointing",
    "model_init_kwargs": "the keys of the model section",
    "reward_weights": "task.rewards, by name",
}

REFUSED: dict[str, str] = {  # name -> why, and what to do
    "trust_remote_code": "a model's own code is never run here; use a model that transformers knows",
    "hub_token": "a token does not belong in a file that is kept with the run; log in with `hf auth login`",
    "auto_find_batch_size": "halving the batch would break the groups; lower per_device_train_batch_size",
    "use_liger_kernel": "it patches the forward that head.impl replaces; set head.impl: memhead",
    "parallelism_config": "GRPO does not support context or sequence parallelism; remove it",
    "local_rank": "the launcher sets it; remove it",
    "vllm_importance_sampling_cap": "deprecated in TRL; set grpo.vllm_importance_sampling_clip_max",
    "use_transformers_paged": "deprecated in TRL; set grpo.use_transformers_continuous_batching",
}

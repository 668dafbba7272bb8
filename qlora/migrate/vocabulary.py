"""The keys that other projects know, as their sources list them: how one project's file is told from another's."""

from __future__ import annotations


def keys(text: str) -> frozenset[str]:
    """Returns the words of a text."""
    return frozenset(text.split())


TRAINING_ARGUMENTS = keys(
    """
    accelerator_config activation_checkpointing activation_checkpointing_kwargs adam_beta1 adam_beta2 adam_epsilon
    auto_find_batch_size average_tokens_across_devices batch_eval_metrics bf16 bf16_full_eval data_seed
    dataloader_drop_last dataloader_in_order dataloader_multiprocessing_context dataloader_num_workers
    dataloader_persistent_workers dataloader_pin_memory dataloader_prefetch_factor ddp_backend ddp_broadcast_buffers
    ddp_bucket_cap_mb ddp_find_unused_parameters ddp_static_graph ddp_timeout debug deepspeed disable_tqdm do_eval
    do_predict do_train enable_jit_checkpoint eval_accumulation_steps eval_delay eval_do_concat_batches
    eval_on_start eval_steps eval_strategy eval_use_gather_object fp16 fp16_full_eval fsdp fsdp_config
    full_determinism generation_config generation_max_length generation_num_beams gradient_accumulation_steps
    gradient_checkpointing gradient_checkpointing_kwargs greater_is_better hub_always_push hub_model_id
    hub_private_repo hub_revision hub_strategy hub_token ignore_data_skip include_for_metrics
    include_num_input_tokens_seen label_names label_smoothing_factor learning_rate length_column_name
    liger_kernel_config load_best_model_at_end local_rank log_level log_level_replica log_on_each_node
    logging_first_step logging_nan_inf_filter logging_steps logging_strategy lr_scheduler_kwargs lr_scheduler_type
    max_grad_norm max_steps metric_for_best_model neftune_noise_alpha num_train_epochs optim optim_args
    optim_target_modules output_dir parallelism_config per_device_eval_batch_size per_device_train_batch_size
    predict_with_generate prediction_loss_only project push_to_hub remove_unused_columns report_to
    restore_callback_states_from_checkpoint resume_from_checkpoint run_name save_on_each_node save_only_model
    save_steps save_strategy save_total_limit seed skip_memory_metrics sortish_sampler tf32 torch_compile
    torch_compile_backend torch_compile_mode torch_empty_cache_steps trackio_bucket_id trackio_space_id
    trackio_static_space_id train_sampling_strategy use_cache use_cpu use_liger_kernel warmup_steps weight_decay
    dispatch_batches evaluation_strategy fp16_backend fp16_opt_level group_by_length half_precision_backend
    include_inputs_for_metrics include_tokens_per_second jit_mode_eval logging_dir no_cuda overwrite_output_dir
    past_index push_to_hub_model_id push_to_hub_token ray_scope save_safetensors split_batches torchdynamo
    tpu_num_cores use_auth_token use_ipex use_legacy_prediction_loop use_mps_device warmup_ratio xpu_backend
    """
)
"""Those of `Seq2SeqTrainingArguments` of transformers 5.23, and those that 4.x had beside them."""

QLORA_KEYS = keys(
    """
    adam8bit bits cache_dir dataset dataset_format diversity_penalty do_mmlu_eval do_sample double_quant
    eval_dataset_size full_finetune group_by_length length_penalty lora_alpha lora_dropout lora_r max_eval_samples
    max_memory_MB max_mmlu_samples max_new_tokens max_train_samples min_new_tokens mmlu_dataset mmlu_source_max_len
    mmlu_split model_name_or_path no_repeat_ngram_size num_beam_groups num_beams penalty_alpha quant_type
    repetition_penalty source_max_len target_max_len temperature top_k top_p train_on_source trust_remote_code
    typical_p use_auth_token warmup_ratio dataset_format lora_modules use_auth
    """
)
"""The arguments of qlora.py beside those of transformers, and those of older versions of it."""

AXOLOTL_KEYS = keys(
    """
    accelerator_config activation_offloading adam_beta1 adam_beta2 adam_beta3 adam_epsilon adam_epsilon2 adapter
    added_tokens_overrides attn_implementation auto_find_batch_size auto_resume_from_checkpoints axolotl_config_path
    base_model base_model_config batch_flattening batch_size bench_dataset bench_split bf16 bfloat16
    bnb_config_kwargs center_rewards_coefficient chat_template chat_template_jinja chat_template_kwargs
    chunked_cross_entropy chunked_cross_entropy_num_chunks cls_model_config comet_api_key comet_experiment_config
    comet_experiment_key comet_mode comet_online comet_project_name comet_workspace context_parallel_size
    cosine_constant_lr_ratio cosine_min_lr_ratio cpo_alpha curriculum_sampling dataloader_drop_last
    dataloader_num_workers dataloader_pin_memory dataloader_prefetch_factor dataset_exact_deduplication
    dataset_keep_in_memory dataset_num_proc dataset_prepared_path dataset_processes dataset_shard_idx
    dataset_shard_num datasets ddp ddp_broadcast_buffers ddp_bucket_cap_mb ddp_find_unused_parameters ddp_timeout
    deepcompile deepspeed default_system_message device device_map dion_lr dion_momentum dion_rank_fraction
    dion_rank_multiple_of do_bench_eval do_causal_lm_eval dp_replicate_size dp_shard_size dpo_beta
    dpo_generate_during_eval dpo_label_smoothing dpo_loss_type dpo_loss_weights dpo_norm_loss dpo_padding_free
    dpo_use_liger_kernel dpo_use_logits_to_keep dpo_use_weighting dynamic_checkpoint eaft_alpha eaft_k
    eager_attention early_stopping_patience ebft embedding_lr embedding_lr_scale embeddings_skip_upcast eot_tokens
    eval_batch_size eval_causal_lm_metrics eval_max_new_tokens eval_sample_packing eval_sequence_len eval_steps
    eval_strategy eval_table_size evals_per_epoch evaluation_strategy excess_length_strategy
    experimental_skip_move_to_device experts_implementation fix_untrained_tokens flash_attention
    flash_attn_cross_entropy flash_attn_d512 flash_attn_fuse_mlp flash_attn_rms_norm flash_optimum flex_attention
    flex_attn_compile_kwargs float16 float32 fp16 fp32_norm_classes fp32_norms fp8 fp8_enable_fsdp_float8_all_gather
    freeze_mm_modules fsdp fsdp_config fsdp_final_state_dict_type fsdp_version fused_attn_kernel gc_collect_steps
    gc_steps gemma4_hybrid_attn_impl generate_samples generation_do_sample generation_max_new_tokens
    generation_prompt_ratio generation_temperature generation_top_k generation_top_p gptq gpu_memory_limit
    gradient_accumulation_steps gradient_checkpointing gradient_checkpointing_kwargs gradio_max_new_tokens
    gradio_server_name gradio_server_port gradio_share gradio_temperature gradio_title greater_is_better
    group_by_length heads_k_stride hf_mlflow_log_artifacts hf_use_auth_token hub_model_id hub_revision hub_strategy
    image_resize_algorithm image_size include_tkps include_tokens_per_second is_falcon_derived_model
    is_llama_derived_model is_mistral_derived_model is_preprocess is_qwen_derived_model jagged_restart_anneal_steps
    jagged_restart_steps jagged_restart_warmup_steps kto_desirable_weight kto_undesirable_weight
    large_head_attention layer_offloading learning_rate lisa_layers_attribute lisa_n_layers lisa_step_interval
    llama4_linearized_experts load_best_model_at_end load_in_4bit load_in_8bit local_rank logging_steps lora_alpha
    lora_alpha_pattern lora_dropout lora_embedding_kernel lora_fan_in_fan_out lora_mlp_kernel lora_model_dir
    lora_modules_to_save lora_o_kernel lora_on_cpu lora_qkv_kernel lora_r lora_rank_pattern lora_target_linear
    lora_target_modules lora_target_parameters loraplus_lr_embedding loraplus_lr_ratio loss_watchdog_patience
    loss_watchdog_threshold low_cpu_mem_usage lr_div_factor lr_groups lr_quadratic_warmup lr_scheduler
    lr_scheduler_kwargs max_grad_norm max_memory max_packed_sequence_len max_prompt_len max_steps
    mean_resizing_embeddings merge_lora merge_method metric_for_best_model micro_batch_size min_sample_len
    mlflow_experiment_name mlflow_run_name mlflow_tracking_uri model_quantization_config
    model_quantization_config_kwargs multipack_real_batches neftune_noise_alpha noisy_embedding_alpha
    num_dataset_shards_to_save num_epochs num_generation_samples num_labels optim_args optim_target_modules
    optimizer orpo_alpha otel_metrics_host otel_metrics_port output_dir overrides_of_model_config
    overrides_of_model_kwargs pad_to_multiple_of pad_to_sequence_len peft peft_autocast_adapter_dtype
    peft_ensure_weight_tying peft_init_lora_weights peft_layer_replication peft_layers_pattern
    peft_layers_to_transform peft_trainable_token_indices peft_use_dora peft_use_rslora plugins pose_max_context_len
    pose_num_chunks pose_split_on_token_ids precompute_ref_log_probs preprocess_iterable pretrain_multipack_attn
    pretrain_multipack_buffer_size pretraining_dataset pretraining_sample_concatenation process_reward_model
    processor_kwargs processor_type profiler_steps profiler_steps_start push_dataset_to_hub qat
    qgalore_cos_threshold qgalore_gamma_proj qgalore_proj_bits qgalore_proj_group_size qgalore_proj_quant
    qgalore_proj_type qgalore_queue_size qgalore_rank qgalore_scale qgalore_update_proj_gap
    qlora_sharded_model_loading quantization quantize_moe_experts ray_num_workers ray_run_name reinit_weights relora
    relora_cpu_offload relora_prune_method relora_prune_ratio remove_unused_columns resize_token_embeddings_to_32x
    resources_per_worker resume_from_checkpoint revision_of_model reward_model ring_attn_func rl rl_beta
    role_boundaries rope_scaling rpo_alpha s2_attention sage_attention sample_packing sample_packing_bin_size
    sample_packing_eff_est sample_packing_group_size sample_packing_mp_start_method sample_packing_sequentially
    save_first_step save_only_model save_safetensors save_steps save_strategy save_total_limit saves_per_epoch
    scaling_softmax scaling_softmax_bias scaling_softmax_factor sdp_attention sdpa_varlen seed
    selective_checkpointing sequence_len sequence_parallel_degree shrink_embeddings shuffle_before_merging_datasets
    shuffle_merged_datasets simpo_gamma skip_prepare_dataset special_tokens streaming
    streaming_multipack_buffer_size strict tensor_parallel_size test_datasets tf32 tiled_mlp tiled_mlp_num_shards
    tiled_mlp_use_original_mlp tokenizer_config tokenizer_legacy tokenizer_save_jinja_files tokenizer_type
    tokenizer_use_fast tokenizer_use_mistral_common tokens torch_compile torch_compile_backend torch_compile_mode
    torch_compile_options torch_empty_cache_steps torchdistx_path total_num_tokens total_supervised_tokens
    trackio_project_name trackio_run_name trackio_space_id train_on_inputs trainer_cls trl trust_remote_code
    type_of_model unfrozen_parameters use_comet use_eaft use_kernels use_mlflow use_onebitllms use_otel_metrics
    use_pose use_ray use_tensorboard use_trackio use_wandb val_set_size vllm wandb_entity wandb_log_model wandb_mode
    wandb_name wandb_project wandb_run_id wandb_watch warmup_ratio warmup_steps weight_decay world_size
    xformers_attention base_model_ignore_patterns eval_batch_size flash_attn flash_attn_fuse_qkv group_by_length
    gpu_memory_limit hf_use_auth_token is_mistral_derived_model is_qwen_derived_model landmark_attention
    liger_cross_entropy liger_fused_linear_cross_entropy liger_glu_activation liger_layer_norm liger_rms_norm
    liger_rope cut_cross_entropy logging_dir lora_embedding_kernel relora_steps relora_warmup_steps save_safetensors
    special_tokens unsloth_cross_entropy_loss unsloth_lora_mlp unsloth_lora_o unsloth_lora_qkv unsloth_rms_norm
    unsloth_rope use_tokenizer_chat_template use_bettertransformer experimental_skip_move_to_device push_to_hub
    hub_private_repo lisa_layers fp16_full_eval bf16_full_eval
    """
)
"""The keys of Axolotl's YAML, with those of its plugins and of older versions."""

FACTORY_KEYS = keys(
    """
    _kt_adapter_artifact_path _kt_config_handle _kt_inference_config adapter_folder adapter_name_or_path
    add_special_tokens add_tokens additional_target apollo_layerwise apollo_proj apollo_proj_type apollo_rank
    apollo_scale apollo_scale_front apollo_scale_type apollo_target apollo_update_interval asft_alpha
    audio_sampling_rate badam_mask_mode badam_mode badam_start_block badam_switch_interval badam_switch_mode
    badam_update_ratio badam_verbose block_diag_attn buffer_size cache_dir compute_accuracy compute_dtype
    create_new_adapter crop_to_patches cutoff_len data_shared_file_system dataset dataset_dir default_system
    device_map disable_gradient_checkpointing disable_shuffling do_sample double_quantization dpo_label_smoothing
    eaft_alpha early_stopping_steps enable_liger_kernel enable_thinking enable_torch_profiler eval_dataset
    eval_num_beams eval_on_each_dataset export_device export_dir export_hub_model_id export_legacy_format
    export_quantization_bit export_quantization_dataset export_quantization_maxlen export_quantization_nsamples
    export_size finetuning_type flash_attn fp8 fp8_backend fp8_enable_fsdp_float8_all_gather freeze_extra_modules
    freeze_language_model freeze_multi_modal_projector freeze_trainable_layers freeze_trainable_modules
    freeze_vision_tower galore_layerwise galore_proj_type galore_rank galore_scale galore_target
    galore_update_interval hf_hub_token hyper_parallel_args hyper_parallel_cp_size ignore_pad_token_for_loss
    image_do_pan_and_scan image_max_pixels image_min_pixels include_effective_tokens_per_second infer_backend
    infer_dtype init_special_tokens interleave_probs kt_cpu_activation kt_expert_checkpoint_path
    kt_lora_expert_intermediate_size kt_lora_expert_num kt_non_expert_weight_path kt_use_lora_experts kt_weight_path
    kto_chosen_weight kto_rejected_weight ld_alpha length_penalty lora_alpha lora_dropout lora_rank lora_target
    loraplus_lr_embedding loraplus_lr_ratio low_cpu_mem_usage mask_history master_addr master_port max_length
    max_new_tokens max_samples media_dir megatron_bridge_args mix_strategy mixture_of_depths model_max_length
    model_name_or_path model_revision module_dropout moe_aux_loss_coef ms_hub_token neat_packing
    new_special_tokens_config num_beams offload_folder oft_block_size oft_rank oft_target om_hub_token
    overwrite_cache overwrite_output_dir packing pissa_convert pissa_init pissa_iter plot_loss ppo_buffer_size
    ppo_epochs ppo_score_norm ppo_target ppo_whiten_rewards pref_bco_weight pref_beta pref_ftx pref_loss
    preprocessing_batch_size preprocessing_num_workers preserve_thinking print_param_status profile_modules
    profiler_active_steps profiler_output_dir profiler_profile_memory profiler_record_shapes profiler_repeat
    profiler_wait_steps profiler_warmup_steps profiler_with_stack pure_bf16 quantization_bit quantization_device_map
    quantization_method quantization_type ray_init_kwargs ray_num_workers ref_model ref_model_adapters
    ref_model_quantization_bit repetition_penalty resize_vocab reward_model reward_model_adapters
    reward_model_quantization_bit reward_model_type rope_scaling sglang_config sglang_lora_backend sglang_maxlen
    sglang_mem_fraction sglang_tp_size shift_attn simpo_gamma skip_special_tokens split_special_tokens stage
    streaming swanlab_api_key swanlab_lark_secret swanlab_lark_webhook_url swanlab_logdir swanlab_mode
    swanlab_project swanlab_run_name swanlab_workspace temperature template tokenized_path tool_format top_k top_p
    train_from_scratch train_on_prompt trust_remote_code upcast_layernorm upcast_lmhead_output use_adam_mini
    use_apollo use_asft_loss use_audio_in_video use_badam use_dft_loss use_dora use_eaft_loss use_fast_tokenizer
    use_galore use_hyper_parallel use_kt use_kv_cache use_llama_pro use_mca use_megatron_bridge use_muon
    use_reentrant_gc use_rslora use_swanlab use_unsloth use_unsloth_gc use_v1_kernels val_size video_fps
    video_max_pixels video_maxlen video_min_pixels vllm_config vllm_enforce_eager vllm_gpu_util vllm_max_lora_rank
    vllm_maxlen additional_target block_diag_attn infer_backend image_resolution new_special_tokens
    num_layer_trainable name_module_trainable lora_bf16_mode reserved_label_len split create_new_adapter use_unsloth
    flash_attn sft_packing efficient_packing streaming dpo_beta dpo_loss dpo_ftx kto_beta upcast_lmhead_output
    visual_inputs video_resolution
    """
)
"""The arguments of LLaMA-Factory beside those of transformers, and those of older versions."""

TRL_KEYS = keys(
    """
    activation_offloading assistant_only_loss attn_implementation bnb_4bit_quant_storage bnb_4bit_quant_type
    chat_template_path completion_only_loss dataset_config dataset_kwargs dataset_name dataset_num_proc
    dataset_streaming dataset_test_split dataset_text_field dataset_train_split datasets dtype eos_token
    eval_packing ignore_bias_buffers load_in_4bit load_in_8bit lora_alpha lora_dropout lora_modules_to_save lora_r
    lora_target_modules lora_target_parameters lora_task_type loss_type max_length model_init_kwargs
    model_name_or_path model_revision packing packing_strategy pad_to_multiple_of pad_token padding_free
    router_aux_loss_coef shuffle_dataset streaming test_split_size truncation_mode trust_remote_code
    use_bnb_nested_quant use_dora use_peft use_rslora config dataset_batch_size datasets max_seq_length
    num_of_sequences test_split_size torch_dtype use_liger model_init_kwargs streaming
    """
)
"""The arguments of `trl sft` beside those of transformers, and those of older versions."""
TRL_PREFERENCE_KEYS = keys(
    """
    alpha beta center_rewards_coefficient cpo_alpha desirable_weight disable_dropout discopop_tau
    f_alpha_divergence_coef f_divergence_type force_use_ref_model generate_during_eval is_encoder_decoder
    label_pad_token_id label_smoothing ld_alpha loss_weights max_completion_length max_prompt_length max_target_length
    model_adapter_name padding_value precompute_ref_batch_size precompute_ref_log_probs ref_adapter_name
    ref_model_mixup_alpha ref_model_sync_steps reference_free rpo_alpha simpo_gamma sync_ref_model tools
    undesirable_weight use_logits_to_keep use_weighting
    """
)
"""Those of `trl dpo`, `kto`, `orpo`, `cpo` and `reward`, and those of older versions."""

SWIFT_KEYS = keys(
    """
    acc_strategy adalora_beta1 adalora_beta2 adalora_deltaT adalora_init_r adalora_orth_reg_weight adalora_target_r
    adalora_tfinal adalora_tinit adapter_act adapter_length adapters add_non_thinking_prefix add_version
    agent_template aligner_lr attn_impl bnb_4bit_compute_dtype bnb_4bit_quant_storage bnb_4bit_quant_type
    bnb_4bit_use_double_quant boft_block_num boft_block_size boft_dropout boft_n_butterfly_factor cached_dataset
    cached_val_dataset callbacks check_model columns create_checkpoint_symlink custom_dataset_info
    custom_register_path dataset dataset_num_proc dataset_shuffle deepspeed_autotp_size device_map
    disable_auto_column_mapping disable_ignore_empty_think download_mode ds3_gather_for_generation
    early_stop_interval enable_channel_loss enable_dft_loss enable_npu_model_patch enable_thinking eval_dataset
    eval_dataset_args eval_generation_config eval_limit eval_metric eval_use_evalscope experts_impl external_plugins
    extra_eval_args fourier_n_frequency fourier_scaling freeze_aligner freeze_llm freeze_parameters
    freeze_parameters_ratio freeze_parameters_regex freeze_vit galore_cos_threshold galore_gamma_proj
    galore_optim_per_parameter galore_proj_bits galore_proj_group_size galore_proj_quant galore_proj_type
    galore_quantization galore_queue_size galore_rank galore_scale galore_target_modules galore_update_proj_gap
    galore_with_embedding group_by_length hqq_axis ignore_args_error init_strategy init_weights interleave_prob
    is_binary_loss_scale lazy_tokenize lisa_activated_layers lisa_step_interval llamapro_num_groups
    llamapro_num_new_blocks load_args load_data_args load_from_cache_file local_repo_path logging_dir logprobs
    lora_alpha lora_bias lora_dropout lora_dtype lora_ga_batch_size lora_ga_direction lora_ga_iters
    lora_ga_max_length lora_ga_scale lora_ga_stable_gamma lora_rank lorap_lr_ratio loss_scale loss_type max_epochs
    max_length max_memory max_model_len max_new_tokens max_pixels max_shard_size model model_author model_kwargs
    model_name model_revision model_type modules_to_save mrl_dims new_special_tokens norm_bbox num_beams num_labels
    optimizer packing packing_length packing_num_proc packing_strategy padding_free padding_side preserve_thinking
    problem_type quant_bits quant_method reft_args reft_intervention_type reft_layer_key reft_layers reft_rank
    repetition_penalty response_prefix resume_only_model rope_scaling router_aux_loss_coef safe_serialization
    sequence_parallel_size shuffle_buffer_size split_dataset_ratio stop_words stopping_strategy stream streaming
    strict structured_outputs_regex swanlab_email_language swanlab_exp_name swanlab_mode swanlab_notification_method
    swanlab_project swanlab_receiver_email swanlab_secret swanlab_sender_email swanlab_smtp_port swanlab_smtp_server
    swanlab_token swanlab_webhook_url swanlab_workspace system target_modules target_parameters target_regex
    task_type temperature template template_backend top_k top_logprobs top_p torch_dtype train_dataloader_shuffle
    trainable_parameters trainable_parameters_regex truncation_strategy tuner_backend tuner_type use_chat_template
    use_dora use_flash_ckpt use_galore use_hf use_logits_to_keep use_rslora use_swift_lora val_dataset
    val_dataset_shuffle vera_d_initial vera_dropout vera_projection_prng_key vera_rank vit_gradient_checkpointing
    vit_lr warmup_ratio zero_hpz_partition_size train_type sft_type model_id_or_path model_id model_name
    custom_train_dataset_path lora_lr_ratio lora_target_modules max_steps num_train_epochs check_dataset_strategy
    train_dataset_sample template_type eval_human dtype use_flash_attn attn_impl self_cognition_sample
    dataset_test_ratio quantization_bit
    rlhf_type ref_model ref_adapters ref_model_type ref_model_revision beta label_smoothing rpo_alpha ld_alpha
    discopop_tau loss_weights cpo_alpha simpo_gamma desirable_weight undesirable_weight center_rewards_coefficient
    """
)
"""The arguments of `swift sft` beside those of transformers, and those of older versions."""

# The stage's side: StageModels in one process against transformers, activations and greedy tokens.
if(TARGET qp_model AND TARGET qp_vision)
  add_executable(qp_dump_stage ${CMAKE_CURRENT_SOURCE_DIR}/dump_stage.cc)
  target_compile_options(qp_dump_stage PRIVATE ${QP_WARNINGS})
  target_precompile_headers(qp_dump_stage PRIVATE <ATen/ATen.h>)
  target_link_libraries(qp_dump_stage PRIVATE qp_model qp_vision qp_weights qp_contract nlohmann_json::nlohmann_json CLI11::CLI11)
  foreach(dtype float32 bfloat16)
    qp_parity(stage.vl_moe.${dtype} SCRIPT stage_parity.py TARGETS qp_dump_stage
      ARGS --dtype ${dtype} --cases vl-moe-hub vl-moe-saved vl-moe-odd)
    qp_parity(stage.vl_dense.${dtype} SCRIPT stage_parity.py TARGETS qp_dump_stage
      ARGS --dtype ${dtype} --cases vl-dense vl-dense-tied)
    qp_parity(stage.text.${dtype} SCRIPT stage_parity.py TARGETS qp_dump_stage
      ARGS --dtype ${dtype} --cases moe-each moe-saved moe-unnormed dense-tied dense-bias)
  endforeach()
  # Both cores: two dumpers run at a time.
  qp_parity(stage.splits.vl SCRIPT split_parity.py TARGETS qp_dump_stage PROCESSORS 2
    ARGS --cases vl-moe-hub vl-dense-tied)
  qp_parity(stage.splits.text SCRIPT split_parity.py TARGETS qp_dump_stage PROCESSORS 2
    ARGS --cases moe-each dense-tied)
  qp_parity(stage.fp8 SCRIPT stage_parity.py TARGETS qp_dump_stage
    ARGS --dtype float32 --fp8 --cases vl-moe-hub vl-moe-saved moe-each dense-tied)
endif()

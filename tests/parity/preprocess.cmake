# stage/vision/preprocess against transformers, torchvision, PIL and PyAV.
if(TARGET qp_preprocess)
  add_executable(qp_preprocess_dump ${CMAKE_CURRENT_LIST_DIR}/preprocess_dump.cc)
  target_compile_options(qp_preprocess_dump PRIVATE ${QP_WARNINGS})
  target_link_libraries(qp_preprocess_dump PRIVATE qp_preprocess nlohmann_json::nlohmann_json)
  qp_parity(preprocess SCRIPT preprocess_parity.py TARGETS qp_preprocess_dump TIMEOUT 300)
endif()

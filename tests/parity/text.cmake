# stage/text against transformers 5.17.0: the real vocabulary, its chat templates, a generated corpus.
if(TARGET qp_text)
  add_executable(qp_text_tool ${CMAKE_CURRENT_LIST_DIR}/text_tool.cc)
  target_compile_options(qp_text_tool PRIVATE ${QP_WARNINGS})
  target_link_libraries(qp_text_tool PRIVATE qp_text nlohmann_json::nlohmann_json)
  qp_parity(text SCRIPT text_parity.py TARGETS qp_text_tool TIMEOUT 300)
endif()

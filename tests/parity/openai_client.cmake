# OpenAI's own Python client against the demo pipeline: what its users will run, unchanged.
if(TARGET qwenctl AND TARGET qwen-head AND TARGET qwen-stage)
  qp_parity(openai_client SCRIPT openai_client.py TARGETS qwenctl)
endif()

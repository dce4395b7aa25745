# Whole pipelines over HTTP: qwenctl, qwen-head and qwen-stage as built, transformers beside them.
if(TARGET qwenctl AND TARGET qwen-head AND TARGET qwen-stage)
  qp_parity(served.vl_moe.float32 SCRIPT e2e_parity.py TARGETS qwenctl
    ARGS --dtype float32 --cases vl-moe-hub --layers 0:3,3:4,4:8)
  qp_parity(served.families.float32 SCRIPT e2e_parity.py TARGETS qwenctl
    ARGS --dtype float32 --cases vl-moe-odd vl-dense-tied moe-each dense-tied --stages 2)
  qp_parity(served.chunked.float32 SCRIPT e2e_parity.py TARGETS qwenctl
    ARGS --dtype float32 --cases vl-moe-hub --stages 2 --batch-tokens 24)
  qp_parity(served.bfloat16 SCRIPT e2e_parity.py TARGETS qwenctl
    ARGS --dtype bfloat16 --cases vl-moe-hub vl-dense moe-saved dense-bias --stages 2)
  qp_parity(served.concurrent SCRIPT concurrent_parity.py TARGETS qwenctl PROCESSORS 2)
  qp_parity(served.exported SCRIPT commands_parity.py TARGETS qwenctl)
  qp_parity(served.digits SCRIPT digits_parity.py TARGETS qwenctl)
endif()

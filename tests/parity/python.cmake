# python_export's own tests: export and validate round trips, tiny checkpoints as transformers loads them, the oracle's self-checks.
if(ORACLE_PYTHON)
  add_test(NAME python.export COMMAND ${ORACLE_PYTHON} -m pytest -q -p no:cacheprovider python_export/tests
    WORKING_DIRECTORY ${CMAKE_SOURCE_DIR})
  set_tests_properties(python.export PROPERTIES LABELS parity TIMEOUT 600
    ENVIRONMENT "PYTHONPATH=${CMAKE_SOURCE_DIR};OMP_NUM_THREADS=1;HF_HUB_OFFLINE=1;PYTHONDONTWRITEBYTECODE=1")
endif()

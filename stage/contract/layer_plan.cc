#include "stage/contract/layer_plan.h"

#include "stage/contract/model_shape.h"

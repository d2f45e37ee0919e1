// All that is compiled once for each instruction set, in the order of use. Included as vector.h is.

#include "vector.h"
//
#include "prototype_tile.h"
//
#include "prototype_pack.h"
//
#include "prototype_search.h"
//
#include "prototype_map.h"
//
#include "prototype_gradient.h"

// All of channel purity that is compiled once for each instruction set, in the order of use. Included as vector.h is.

#include "vector.h"
//
#include "prototype_tile.h"
//
#include "eight.h"
//
#include "channels_pairs.h"

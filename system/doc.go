// Package system wires the parts of knarr into processes. Each role (server, agent) is one function that makes its parts
// in order, starts them and waits; everything else is a part's own business. It alone knows all other packages.
package system

import _ "a.knarr/early" // quiet queues, quick initialization

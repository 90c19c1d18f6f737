// Package test holds the end-to-end tests: a real cluster of two nodes on this machine, driven by upstream's kubectl as a
// person drives it, crashed, fed with bad input, and taken down, after which nothing may be left.
//
// All of it happens in a network namespace that stands for the machine, with a second one as the world outside, so that
// the tests neither need nor touch this machine's own network, and see each packet that would leave it.
package test

// Package control runs the controllers of a Kubernetes cluster in the server process.
//
// What the controllers mean is upstream's: each is built by upstream's own constructor. What is ours is around them: they read the store
// itself (package client), write through the API with an identity of their own, start when there is something for them to do, and look at
// discovery when it changes and not every 30 seconds.
//
// One table ([controllers]) declares every controller: name, identity, the resources it reads (inputs) and writes (outputs), and what must
// exist before it starts. A controller that asks for an informer outside its inputs is not started; tests hold the outputs to what upstream's
// bootstrap policy lets the identity write.
//
// Outline: table.go declares; run.go starts and stops; trigger.go waits for first objects; changes.go turns discovery into events; own.go has
// the constructors of the few controllers that upstream would build around polls; environment.go is what constructors are given.
package control

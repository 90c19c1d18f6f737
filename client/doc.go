// Package client is how the parts of knarr that live in the server process talk to the cluster.
//
// It has two halves:
//
//   - Writes (and reads that want the API's own answer) go through [Config]: a rest.Config whose transport hands the request straight to
//     the API pipeline's http.Handler. No socket, no TLS, but the very same authorization, admission and audit as for everybody else. Who
//     is asking travels as a context value ([WithUser], [UserFrom]), never as a header, so that no request from outside can claim it.
//   - Reads go through informers over the store's tables ([NewFactory], [NewExtensionsFactory], [NewAggregatorFactory],
//     [NewMetadataFactory]). They implement client-go's own interfaces, yet hold no copy of anything: a lister reads the table's current
//     snapshot, an event handler holds a cursor into the table's event window.
//
// Objects handed out by informers are the store's own and must not be written to, exactly as with client-go's.
package client

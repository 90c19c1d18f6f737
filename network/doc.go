// Package network is the parent of everything that moves packets in knarr.
//
//	netns         named network namespaces: make, enter, delete
//	sysctl        kernel settings that are changed on up and put back on down
//	nodens        further nodes of one machine, each in a network namespace of its own
//	pod           the pod network of one node: addresses, links, routes to other nodes
//	service       services and host ports of one node: the nftables table "knarr"
//	loadbalancer  the controller that gives LoadBalancer services the node addresses
//	dns           the cluster's DNS server, one on every node
//	nettest       topologies of namespaces for the tests of the above
//
// The packages know client-go's interfaces and informers and nothing else of knarr. No tool of the host (ip, nft, iptables) is
// executed: links and routes go over rtnetlink, rules over nfnetlink. Everything that survives a crash of the process can be found
// again by what the kernel holds (link names and aliases, route protocol RouteProtocol, the table name) or by files, never only by memory.
package network

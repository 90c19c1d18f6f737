package control

import (
	"strings"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/kubernetes/cmd/kube-controller-manager/names"
)

// everything as an input or output stands for all resources that the API serves.
const everything = "*"

// A controller is one row of the table.
type controller struct {
	// name is upstream's.
	name string
	// account is the service account in kube-system that it acts as; "" is system:kube-controller-manager itself.
	account string
	// inputs are the resources (name.group) of the informers that it reads.
	inputs []string
	// outputs are the resources (name.group/subresource) that it writes, events left out.
	outputs []string
	// when is what must exist before it starts; nil starts it at once. It then runs until the end.
	when []trigger
	// build makes it; nil is upstream's own constructor of that name.
	build constructor
}

// controllers is the table. Those that a fresh cluster needs first come first.
func controllers() []controller {
	//long: it is a table, one row for each controller
	return []controller{
		// Namespaces and identities.
		{name: names.ServiceAccountController, account: "service-account-controller", inputs: list("namespaces", "serviceaccounts"),
			outputs: list("serviceaccounts")},
		{name: names.RootCACertificatePublisherController, account: rootCAAccount, inputs: list("configmaps", "namespaces"),
			outputs: list("configmaps")},
		{name: names.ClusterRoleAggregationController, account: "clusterrole-aggregation-controller",
			inputs: list("clusterroles.rbac.authorization.k8s.io"), outputs: list("clusterroles.rbac.authorization.k8s.io")},
		{name: names.NamespaceController, account: "namespace-controller", inputs: list("namespaces", "pods"),
			outputs: list("namespaces/finalize", "namespaces/status", everything), build: newNamespaceController},
		{name: names.ServiceAccountTokenController, inputs: list("serviceaccounts", "secrets"), outputs: list("secrets", "serviceaccounts"),
			when: []trigger{secretOf(corev1.SecretTypeServiceAccountToken)}, build: newTokenController},
		{name: names.LegacyServiceAccountTokenCleanerController, account: "legacy-service-account-token-cleaner",
			inputs: list("pods", "secrets", "serviceaccounts"), outputs: list("secrets"), when: []trigger{secretOf(corev1.SecretTypeServiceAccountToken)}},
		{name: names.BootstrapSignerController, account: "bootstrap-signer", inputs: list("configmaps", "secrets"), outputs: list("configmaps"),
			when: []trigger{secretOf(secretTypeBootstrapToken)}},
		{name: names.TokenCleanerController, account: "token-cleaner", inputs: list("secrets"), outputs: list("secrets"),
			when: []trigger{secretOf(secretTypeBootstrapToken)}},

		// Nodes.
		{name: names.NodeIpamController, account: "node-controller", inputs: list("nodes"), outputs: list("nodes")},
		{name: names.NodeLifecycleController, account: "node-controller", inputs: list("leases.coordination.k8s.io", "pods", "nodes", "daemonsets.apps"),
			outputs: list("nodes", "nodes/status", "pods", "pods/status"), build: newNodeLifecycle},
		{name: names.TaintEvictionController, account: "node-controller", inputs: list("nodes", "pods"), outputs: list("pods", "pods/status")},
		{name: names.TTLController, account: "ttl-controller", inputs: list("nodes"), outputs: list("nodes")},
		{name: names.PodGarbageCollectorController, account: "pod-garbage-collector", inputs: list("nodes", "pods"), outputs: list("pods", "pods/status")},

		// Services.
		{name: names.EndpointSliceController, account: "endpointslice-controller",
			inputs: list("pods", "services", "nodes", "endpointslices.discovery.k8s.io"), outputs: list("endpointslices.discovery.k8s.io")},
		{name: names.EndpointsController, account: "endpoint-controller", inputs: list("pods", "services", "endpoints"), outputs: list("endpoints")},
		{name: names.EndpointSliceMirroringController, account: "endpointslicemirroring-controller",
			inputs: list("endpoints", "services", "endpointslices.discovery.k8s.io"), outputs: list("endpointslices.discovery.k8s.io")},
		{name: names.ServiceCIDRController, account: "service-cidrs-controller",
			inputs:  list("servicecidrs.networking.k8s.io", "ipaddresses.networking.k8s.io"),
			outputs: list("servicecidrs.networking.k8s.io", "servicecidrs.networking.k8s.io/status")},

		// Workloads.
		{name: names.DeploymentController, account: "deployment-controller", inputs: list("deployments.apps", "replicasets.apps", "pods"),
			outputs: list("deployments.apps", "deployments.apps/status", "replicasets.apps", "pods"), when: on("apps/v1", "deployments")},
		{name: names.ReplicaSetController, account: "replicaset-controller", inputs: list("replicasets.apps", "pods"),
			outputs: list("replicasets.apps", "replicasets.apps/status", "pods"), when: on("apps/v1", "replicasets")},
		{name: names.DaemonSetController, account: "daemon-set-controller",
			inputs:  list("daemonsets.apps", "controllerrevisions.apps", "pods", "nodes"),
			outputs: list("daemonsets.apps/status", "pods", "controllerrevisions.apps"), when: on("apps/v1", "daemonsets")},
		{name: names.StatefulSetController, account: "statefulset-controller",
			inputs:  list("pods", "statefulsets.apps", "persistentvolumeclaims", "controllerrevisions.apps"),
			outputs: list("statefulsets.apps/status", "pods", "controllerrevisions.apps", "persistentvolumeclaims"), when: on("apps/v1", "statefulsets")},
		{name: names.JobController, account: "job-controller", inputs: list("pods", "jobs.batch"),
			outputs: list("jobs.batch", "jobs.batch/status", "pods"), when: on("batch/v1", "jobs")},
		{name: names.CronJobController, account: "cronjob-controller", inputs: list("jobs.batch", "cronjobs.batch"),
			outputs: list("jobs.batch", "cronjobs.batch", "cronjobs.batch/status", "pods"), when: on("batch/v1", "cronjobs")},
		{name: names.TTLAfterFinishedController, account: "ttl-after-finished-controller", inputs: list("jobs.batch"), outputs: list("jobs.batch"),
			when: on("batch/v1", "jobs")},
		{name: names.ReplicationControllerController, account: "replication-controller", inputs: list("pods", "replicationcontrollers"),
			outputs: list("replicationcontrollers", "replicationcontrollers/status", "pods"), when: on("v1", "replicationcontrollers")},
		{name: names.HorizontalPodAutoscalerController, account: "horizontal-pod-autoscaler",
			inputs: list("horizontalpodautoscalers.autoscaling", "pods"), outputs: list("horizontalpodautoscalers.autoscaling/status", everything+"/scale"),
			when: on("autoscaling/v2", "horizontalpodautoscalers")},
		{name: names.DisruptionController, account: "disruption-controller",
			inputs: list("pods", "poddisruptionbudgets.policy", "replicationcontrollers", "replicasets.apps", "deployments.apps",
				"statefulsets.apps"),
			outputs: list("poddisruptionbudgets.policy/status", "pods/status"),
			when:    append(on("policy/v1", "poddisruptionbudgets"), podWith(disruptionTarget))},
		{name: names.PodGroupProtectionController, account: names.PodGroupProtectionController, inputs: list("podgroups.scheduling.k8s.io", "pods"),
			outputs: list("podgroups.scheduling.k8s.io"), when: on("scheduling.k8s.io/v1alpha2", "podgroups")},

		// Storage.
		{name: names.PersistentVolumeBinderController, account: "persistent-volume-binder",
			inputs: list("persistentvolumes", "persistentvolumeclaims", "storageclasses.storage.k8s.io", "pods", "nodes"),
			outputs: list("persistentvolumes", "persistentvolumes/status", "persistentvolumeclaims", "persistentvolumeclaims/status",
				"pods"),
			when: on("v1", "persistentvolumes", "persistentvolumeclaims")},
		{name: names.PersistentVolumeAttachDetachController, account: "attachdetach-controller",
			inputs: list("pods", "nodes", "persistentvolumeclaims", "persistentvolumes", "csinodes.storage.k8s.io", "csidrivers.storage.k8s.io",
				"volumeattachments.storage.k8s.io"),
			outputs: list("nodes/status", "volumeattachments.storage.k8s.io"),
			when:    append(on("v1", "persistentvolumes"), append(on("storage.k8s.io/v1", "volumeattachments"), podWith(attachableVolume))...)},
		{name: names.PersistentVolumeExpanderController, account: "expand-controller", inputs: list("persistentvolumeclaims"),
			outputs: list("persistentvolumes", "persistentvolumeclaims/status"), when: on("v1", "persistentvolumeclaims")},
		{name: names.PersistentVolumeClaimProtectionController, account: "pvc-protection-controller",
			inputs: list("persistentvolumeclaims", "pods"), outputs: list("persistentvolumeclaims", "persistentvolumeclaims/status"),
			when: on("v1", "persistentvolumeclaims")},
		{name: names.PersistentVolumeProtectionController, account: "pv-protection-controller", inputs: list("persistentvolumes"),
			outputs: list("persistentvolumes"), when: on("v1", "persistentvolumes")},
		{name: names.VolumeAttributesClassProtectionController, account: "volumeattributesclass-protection-controller",
			inputs:  list("persistentvolumeclaims", "persistentvolumes", "volumeattributesclasses.storage.k8s.io"),
			outputs: list("volumeattributesclasses.storage.k8s.io"), when: on("storage.k8s.io/v1", "volumeattributesclasses")},
		{name: names.EphemeralVolumeController, account: "ephemeral-volume-controller", inputs: list("pods", "persistentvolumeclaims"),
			outputs: list("persistentvolumeclaims"), when: []trigger{podWith(ephemeralVolume)}},

		// Certificates.
		{name: names.CertificateSigningRequestSigningController, account: "certificate-controller",
			inputs:  list("certificatesigningrequests.certificates.k8s.io"),
			outputs: list("certificatesigningrequests.certificates.k8s.io/status"), when: on("certificates.k8s.io/v1", "certificatesigningrequests")},
		{name: names.CertificateSigningRequestApprovingController, account: "certificate-controller",
			inputs: list("certificatesigningrequests.certificates.k8s.io"),
			outputs: list("certificatesigningrequests.certificates.k8s.io/approval",
				"subjectaccessreviews.authorization.k8s.io"), when: on("certificates.k8s.io/v1", "certificatesigningrequests")},
		{name: names.CertificateSigningRequestCleanerController, account: "certificate-controller",
			inputs:  list("certificatesigningrequests.certificates.k8s.io"),
			outputs: list("certificatesigningrequests.certificates.k8s.io"), when: on("certificates.k8s.io/v1", "certificatesigningrequests")},
		{name: names.PodCertificateRequestCleanerController, account: "podcertificaterequestcleaner",
			inputs:  list("podcertificaterequests.certificates.k8s.io"),
			outputs: list("podcertificaterequests.certificates.k8s.io"), when: on("certificates.k8s.io/v1beta1", "podcertificaterequests")},
		{name: names.KubeAPIServerClusterTrustBundlePublisherController, account: "kube-apiserver-serving-clustertrustbundle-publisher",
			outputs: list("clustertrustbundles.certificates.k8s.io")},

		// Devices.
		{name: names.ResourceClaimController, account: "resource-claim-controller",
			inputs:  list("pods", "podgroups.scheduling.k8s.io", "resourceclaims.resource.k8s.io", "resourceclaimtemplates.resource.k8s.io"),
			outputs: list("resourceclaims.resource.k8s.io", "resourceclaims.resource.k8s.io/status", "pods/status"),
			when:    on("resource.k8s.io/v1", "resourceclaims", "resourceclaimtemplates")},
		{name: names.DeviceTaintEvictionController, account: "device-taint-eviction-controller",
			inputs: list("pods", "resourceclaims.resource.k8s.io", "resourceslices.resource.k8s.io", "devicetaintrules.resource.k8s.io",
				"deviceclasses.resource.k8s.io"),
			outputs: list("pods", "pods/status"), when: on("resource.k8s.io/v1", "resourceslices", "resourceclaims")},
		{name: names.ResourcePoolStatusRequestController, account: "resourcepoolstatusrequest-controller",
			inputs: list("resourcepoolstatusrequests.resource.k8s.io", "resourceslices.resource.k8s.io",
				"resourceclaims.resource.k8s.io"),
			outputs: list("resourcepoolstatusrequests.resource.k8s.io/status"),
			when:    on("resource.k8s.io/v1alpha3", "resourcepoolstatusrequests")},

		// Policy, quota, garbage.
		{name: names.ValidatingAdmissionPolicyStatusController, account: "validatingadmissionpolicy-status-controller",
			inputs:  list("validatingadmissionpolicies.admissionregistration.k8s.io"),
			outputs: list("validatingadmissionpolicies.admissionregistration.k8s.io/status"),
			when:    on("admissionregistration.k8s.io/v1", "validatingadmissionpolicies")},
		{name: names.ResourceQuotaController, account: "resourcequota-controller", inputs: list(everything), outputs: list("resourcequotas/status"),
			when: on("v1", "resourcequotas"), build: newQuotaController},
		{name: names.GarbageCollectorController, account: "generic-garbage-collector", inputs: list(everything), outputs: list(everything),
			build: newGarbageCollector},
	}
}

// Graph describes the dataflow of the table, one line for each controller: what it reads -> what it writes.
func Graph() []string {
	var out []string
	for _, c := range controllers() {
		out = append(out, c.name+": "+strings.Join(c.inputs, ", ")+" -> "+strings.Join(c.outputs, ", "))
	}
	return out
}

func list(s ...string) []string { return s }

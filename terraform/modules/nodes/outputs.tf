output "nodes" {
  description = "Node to its address, instance and disks as the role `common` takes them. The link to a disk is made by udev from the volume's number, whatever name the kernel gave it."
  value = {
    for node, instance in aws_instance.this : node => {
      address     = instance.private_ip
      instance_id = instance.id
      disks = [
        for key in sort([for key, disk in local.disks : key if disk.node == node]) : {
          device = "/dev/disk/by-id/nvme-Amazon_Elastic_Block_Store_${replace(aws_ebs_volume.this[key].id, "-", "")}"
          path   = local.disks[key].mount
        }
      ]
    }
  }
}
